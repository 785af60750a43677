"""IA3, a trained factor for every output or input of a layer."""
