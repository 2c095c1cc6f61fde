"""The learned JPEG: an encoder is learned, the decoder is every JPEG decoder."""
