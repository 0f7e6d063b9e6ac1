"""What runs inside vLLM's own Python, started by pipeline/vllm_env/worker.py; nothing else here imports vLLM.

Only the standard library, vLLM and what vLLM brings may be imported, besides modules of this package that need
nothing else.
"""
