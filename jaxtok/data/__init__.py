"""Pictures in, batches out: sources, transforms and the pipeline (numpy, Pillow and Grain; never jax).

A **source** has `__len__`, `__getitem__(i) -> example` and `class_names`; it can be pickled, and reads in any order.
An **example** is a dict: `image` uint8 [H W 3] RGB, `label` int32, `caption` str, and extras such as `patch_labels`
int32 [h w]. A source may also say what a message should call a record, `describe(i) -> str`, and how many threads read
it best, `read_threads`.
A **transform** is a function `(example, rng) -> example`. `pipeline` turns a source and transforms into batches.
"""
