"""The only rooms that know ComfyUI's internals."""
