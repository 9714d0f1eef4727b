"""The command line: train, validate, test and predict; prepare text, generate, describe a config, measure."""

from rat_cli.main import main

if __name__ == "__main__":
    main()
