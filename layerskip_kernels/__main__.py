"""`python -m layerskip_kernels` is the command `layerskip`."""

from layerskip_kernels.cli import main

if __name__ == "__main__":
    main()
