"""What the parity, conformance and interchange suites share."""
