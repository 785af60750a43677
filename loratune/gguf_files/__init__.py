"""GGUF files of models and adapters for llama.cpp, and the proof that llama.cpp answers alike."""
