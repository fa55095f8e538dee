"""Promises about accuracy (``risk``) and time (``deadlines``), and an alarm for other images (``drift``)."""
