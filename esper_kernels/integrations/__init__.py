"""Other people's trainers with our kernels: one module for each, imported by name.

`huggingface` and `fused_head` serve Hugging Face's Trainer, `lightning` and `torchmetrics` the
packages of those names. A module imports the package that it serves and nothing of `esper_train`;
`esper_kernels` imports none of them.
"""
