"""From files and Hub data sets to padded batches."""
