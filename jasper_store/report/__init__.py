"""What there is to see in a dataset, as plain values; drawing them is somebody else's business."""
