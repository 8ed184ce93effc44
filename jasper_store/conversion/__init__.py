"""Files written and checked: conversion with its proof, verification, and DirectoryWriter."""
