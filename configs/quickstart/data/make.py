"""Cut the small data sets of the quickstart out of full ones. Run: python make.py SOURCE [OUT]

SOURCE holds (zstd parquet, columns as the attribution files name them)

    corpus/books-train.parquet        whole public-domain books
    squad/train.parquet  dev.parquet  SQuAD v1.1 rows: id, title, context, question, answers
    multihop/hotpotqa_train.parquet   HotpotQA training rows with their ten paragraphs
    longbench/<task>.parquet          LongBench rows as the ReFINE paper's code prepared them

OUT is this file's folder unless given. Every choice is a fixed list, the first rows, or a draw from
a fixed seed, so the files come out the same from the same SOURCE.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BOOKS = (
    "eltec-ENG18900_Doyle",
    "eltec-ENG18952_Wells",
    "eltec-ENG19060_Nesbit",
    "eltec-ENG19080_Chesterton",
)
BOOK_CHARACTERS = 250_000
POST_ARTICLES, POST_PER_ARTICLE = 10, 40
POST_MULTIHOP, EVAL_MULTIHOP = 80, 60
EVAL_CONTEXTS = 240
LONGBENCH_TASKS, LONGBENCH_ROWS = ("hotpotqa", "2wikimqa", "musique", "gov_report"), 8
SEED = 0


def main(source: Path, out: Path) -> None:
    write(out / "mid/books.parquet", books(read(source / "corpus/books-train.parquet")))
    write(out / "post/squad.parquet", post_squad(read(source / "squad/train.parquet")))
    write(out / "eval/squad/dev.parquet", eval_squad(read(source / "squad/dev.parquet")))
    post, evaluation = multihop(read(source / "multihop/hotpotqa_train.parquet"))
    write(out / "post/hotpotqa.parquet", post)
    write(out / "eval/multihop/hotpotqa.parquet", evaluation)
    for task in LONGBENCH_TASKS:
        table = read(source / f"longbench/{task}.parquet").slice(0, LONGBENCH_ROWS)
        write(out / f"eval/longbench/{task}.parquet", table)


def books(table: pa.Table) -> pa.Table:
    """Four novels, each cut at the last paragraph that ends within BOOK_CHARACTERS."""
    table = table.take([place for place, name in enumerate(table["id"].to_pylist()) if name in BOOKS])
    texts = [text[: end_of_paragraph(text)] for text in table["text"].to_pylist()]
    return table.set_column(table.column_names.index("text"), "text", pa.array(texts))


def end_of_paragraph(text: str) -> int:
    return len(text) if len(text) <= BOOK_CHARACTERS else text.rindex("\n\n", 0, BOOK_CHARACTERS)


def post_squad(table: pa.Table) -> pa.Table:
    """POST_PER_ARTICLE questions of each of POST_ARTICLES articles of middle size, over as many paragraphs as can be.

    Few articles, so that leaving all their rows out of base training costs little.
    """
    articles: dict[str, dict[str, list[int]]] = {}
    for place, row in enumerate(table.select(["source", "title", "context"]).to_pylist()):
        if row["source"].startswith("SQuAD v1.1"):
            articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(place)
    sizes = {title: sum(map(len, contexts.values())) for title, contexts in articles.items()}
    middle = sorted(title for title, size in sizes.items() if 100 <= size <= 230)
    chosen: list[int] = []
    for title in random.Random(SEED).sample(middle, POST_ARTICLES):
        contexts = list(articles[title].values())
        turns = range(max(map(len, contexts)))
        by_turn = [context[turn] for turn in turns for context in contexts if turn < len(context)]
        chosen += by_turn[:POST_PER_ARTICLE]
    return table.take(sorted(chosen))


def eval_squad(table: pa.Table) -> pa.Table:
    """One question for each of EVAL_CONTEXTS paragraphs, drawn over all articles, in an order that mixes them."""
    first: dict[str, int] = {}
    for place, context in enumerate(table["context"].to_pylist()):
        first.setdefault(context, place)
    return table.take(random.Random(SEED).sample(list(first.values()), EVAL_CONTEXTS))


def multihop(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows for post-training, and others for evaluation none of whose supporting paragraphs the first contain."""
    rows = table.to_pylist()
    places = [place for place, row in enumerate(rows) if row["supporting_titles"] and len(row["paragraphs"]) == 10]
    random.Random(SEED).shuffle(places)
    post = places[:POST_MULTIHOP]
    seen = {title for place in post for title in rows[place]["paragraph_titles"]}
    rest = [place for place in places[POST_MULTIHOP:] if not seen & set(rows[place]["supporting_titles"])]
    return table.take(sorted(post)), table.take(sorted(rest[:EVAL_MULTIHOP]))


def read(path: Path) -> pa.Table:
    return pq.read_table(path)


def write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(table.replace_schema_metadata(None), temporary, compression="zstd", compression_level=22)
    temporary.replace(path)
    print(f"{path}: {table.num_rows} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).resolve().parent)
