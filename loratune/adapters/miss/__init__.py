"""MiSS, one trained shard that is repeated along a layer's inputs."""
