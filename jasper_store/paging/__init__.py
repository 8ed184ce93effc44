"""Maps and pages: what the operating system does with mapped files and large buffers."""
