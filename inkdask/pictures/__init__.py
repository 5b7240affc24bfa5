"""Pictures people can use: an OME-Zarr pyramid, PNG, TIFF, JPEG, with their scale and origin."""
