"""A short run of the command line, for the tests of it; its fixtures stand in conftest.py."""


def options(data_dir):
    """The flags of a run that takes no time, on the data of the fixture ``data_dir``."""
    return ["--data", "mnist", "--data-dir", str(data_dir), "--hidden", "6", "5", "--epochs", "2", "--threads", "1"]
