"""Learned multi-view image codec: cameras encode alone, the receiver decodes any number of views together."""
