"""The server: fronts, scheduler, delivery, life cycle."""
