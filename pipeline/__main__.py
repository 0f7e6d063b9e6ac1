"""`python -m pipeline` is `quantize`."""

from pipeline.cli import main

main(prog_name="quantize")
