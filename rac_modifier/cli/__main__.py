"""`python -m rac_modifier.cli`."""

from rac_modifier.cli import main

if __name__ == "__main__":
    main()
