"""Descriptions as plain data: models, layouts, precision, hardware and fabrics."""
