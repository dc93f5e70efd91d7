"""What ends a replay whose graph was of something else than what is there now."""


class Stale(Exception):
    """A graph was recorded with another setting than that of now; what it wrote is no one's."""
