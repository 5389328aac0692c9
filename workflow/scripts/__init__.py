"""The scripts that the rules run. One that a pipeline started ends with it, from before its imports on."""

from workflow.lib.children import follow_pipeline

follow_pipeline()
