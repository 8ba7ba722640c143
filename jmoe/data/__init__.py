"""Text on disk becomes batches, in four steps, each in its own file:

`sources`     a source of the config (embedded corpus, local files, TFDS) yields documents, in one fixed order
`tokenizer`   a document's text becomes token ids, with `eos` before and after it
`prepare`     the ids are packed into records of seq_len + 1 tokens, once, and kept in the cache directory
`pipeline`    records are shuffled, mixed and stacked into `jmoe.batch.Batch`es, a pure function of (seed, step)
"""
