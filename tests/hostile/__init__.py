"""Front-ends, guests and devices that mean harm, one file for each class; tests name the bugs they descend from."""
