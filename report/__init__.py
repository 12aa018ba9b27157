"""What is known about painted pictures: a second judge, measures, and a page about them."""
