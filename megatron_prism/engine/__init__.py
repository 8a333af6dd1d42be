"""The engine: what the stages share, on megatron-core; the only importer of megatron.core."""

import warnings

# At import megatron-core warns a dozen times that TransformerEngine and Apex are missing; `prism doctor` says it once, with what runs instead.
warnings.filterwarnings("ignore", module=r"megatron\.core")
