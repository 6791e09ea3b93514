from vllm_unified.cli import main

main()
