"""Writing checkpoints: conversion of what a hub or a directory has, and saving of tensors."""
