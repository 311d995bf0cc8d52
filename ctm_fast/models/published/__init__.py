"""Files that others publish, read without running any of the code that pickles may hold."""

from ctm_fast.models.published.files import PublishedFile, read_published

__all__ = ["PublishedFile", "read_published"]
