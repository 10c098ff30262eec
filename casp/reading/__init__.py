"""The door: everything that a user's files say is checked here before anything is allocated or run for it.

One reader for each kind of thing, shared by stages and evaluation: files and folders (`files`), JSON (`documents`),
headers of safetensors (`header`), the config of a model (`config`), what describes a compression (`compression`),
tokenizers and processors (`pretrained`), texts and rows of data (`texts`), pictures (`pictures`). What is wrong is a
UserError: one sentence that names the thing and the remedy.
"""
