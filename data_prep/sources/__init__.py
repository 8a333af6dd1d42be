"""The sources of the PRISM paper, a TOML file each, and what reads such files."""
