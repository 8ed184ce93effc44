"""The report as one HTML page: SVG drawn here, styles inside, nothing fetched from anywhere."""
