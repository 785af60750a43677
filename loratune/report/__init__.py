"""Reports as self-contained HTML pages: a run, a comparison, several runs side by side."""
