"""Charts as SVG, without scripts."""
