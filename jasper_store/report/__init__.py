"""What a report shows of a dataset: plain values, and the page that is drawn from them."""
