"""LaCT: fast weights that are read chunk by chunk and updated at the end of each chunk; and their state anywhere.

After n tokens of a text, (n - 1) // L updates have been made: the chunk that was read last, even a full one, updates
nothing until a further token arrives. Its 1 to L tokens are kept, in a buffer of L.
"""

from __future__ import annotations

from torch import Tensor

from refine_kernels.choose import Impl, choose
from refine_kernels.lact.chunks import LaCT, Place, Reader, read
from refine_kernels.lact.reference import Chunk, FastWeights, Fresh, Weights, row_norms

__all__ = ["Chunk", "FastWeights", "Fresh", "LaCT", "Place", "Reader", "Weights", "lact", "row_norms"]


def lact(
    q_BTHK: Tensor,
    tokens: Chunk,
    fast: FastWeights | Fresh,
    unfinished: Chunk | None,
    place: Place,
    *,
    chunk_size: int,
    muon: bool = False,
    joint: bool = False,
    boundaries: bool = False,
    in_place: bool = False,
    impl: Impl = "auto",
) -> LaCT:
    """Outputs for T tokens of each of B rows, and the state after each row's last real token.

    Args:
        q_BTHK: queries, any float dtype; products run in it, norms of weights in float32 or wider.
        tokens: keys, values, learning rates and momenta of the same T tokens; keys and values in the dtype of q,
            learning rates in float32 (float64 for float64).
        fast: the weights that the rows start from, each [B, H, ...]; or those of texts that begin here.
        unfinished: the tokens that no update has used yet, in a buffer of L each, from its start; zeros follow.
            None for texts that begin here.
        place: where each row stands in its text.
        chunk_size: L. Rows may be at different places of their chunks.
        muon, joint: see `reference.update`.
        boundaries: keep the weights after every update, which `LaCT.state_at` needs.
        in_place: a single token that ends no chunk may be written into `unfinished`, whose tensors are then those of
            the result. Without gradients and boundaries.
        impl: see `refine_kernels.choose`.
    """
    (w0, w1, _), K = fast.weights, q_BTHK.shape[-1]
    prenorm = fast.prenorm if isinstance(fast, Fresh) else fast.main is not None
    ops = choose(
        __name__, impl, q_BTHK,
        prenorm=prenorm, joint=muon and joint, square=w0.shape[-2:] == w1.shape[-2:] == (K, K),
        scalar=tokens.rates_BLHX.shape[-1] == 3,
    )  # fmt: skip
    return read(
        ops, q_BTHK, tokens, fast, unfinished, place, L=chunk_size, muon=muon, joint=joint, boundaries=boundaries,
        in_place=in_place,
    )  # fmt: skip
