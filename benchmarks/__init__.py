"""Paired measurements against other tools and against the physical floor.

``make bench`` runs them all, writes ``benchmarks/results/*.json`` and renders
``docs/performance.md`` from those files.  Every part also runs alone:
``python -m benchmarks.step --size micro --results FOLDER``.
"""
