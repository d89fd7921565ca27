"""The error of this package."""


class MeshError(ValueError):
    """Something does not fit the mesh; one line that says what and how to change it."""
