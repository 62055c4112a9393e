"""Speed and quality reports."""
