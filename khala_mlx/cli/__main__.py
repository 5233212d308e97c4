"""`python -m khala_mlx.cli`, the same as `khala`."""

from khala_mlx.cli import main

main(prog_name="khala")
