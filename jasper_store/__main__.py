"""``python -m jasper_store``: the command line of the Python that runs it, where its scripts are not on the PATH."""

from jasper_store.cli.app import main

if __name__ == "__main__":
    main()
