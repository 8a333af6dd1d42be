"""`python -m megatron_prism` and `torchrun -m megatron_prism` are the `prism` command."""

if __name__ == "__main__":  # nothing outside: every process that we spawn imports this file again
    from megatron_prism.cli import main

    main()
