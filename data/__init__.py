"""The pictures that ship, and render.py, which makes them."""
