"""Text and questions on disk become batches of token ids.

`read` opens files, `stream` fixes the order, `tokenizer` turns text into ids; `corpus`, `qa` and
`prompts` make the batches of the three stages. Nothing here knows models, devices or losses.
"""
