"""Small commands around data and models, each run from the repository's root as `python -m data_tools.NAME`."""
