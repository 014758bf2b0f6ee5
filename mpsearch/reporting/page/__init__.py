"""The page of a run: `index.html`, one file with its data, styles and scripts."""
