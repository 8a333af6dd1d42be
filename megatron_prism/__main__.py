"""`python -m megatron_prism` and `torchrun -m megatron_prism` are the `prism` command."""

from megatron_prism.cli import main

if __name__ == "__main__":
    main()
