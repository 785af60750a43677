"""One module per subcommand: ``Config`` and ``run`` for Hydra ones, ``run`` alone for others."""
