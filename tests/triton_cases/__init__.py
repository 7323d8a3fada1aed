"""What `triton_compile.py` compiles: per op a module with a list CASES of production configurations."""
