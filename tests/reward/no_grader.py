"""A grader's module that cannot be imported."""

raise ImportError("deliberately broken")
