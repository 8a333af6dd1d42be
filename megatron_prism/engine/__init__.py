"""The engine: what the stages share, on megatron-core; the only importer of megatron.core."""

import warnings

# At import megatron-core warns a dozen times that TransformerEngine and Apex are missing; `prism doctor` says it once, with what runs instead.
warnings.filterwarnings("ignore", module=r"megatron\.core")
# megatron-core 0.16.1 calls collectives by names that torch 2.13 has renamed, and a wrapper of torch warns at each
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
